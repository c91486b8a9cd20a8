"""report.html: one file that needs nothing else, says what report.json says, and can be read by anybody."""

import base64
import html
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dist_train.study.charts import Figure, Picture, save, style
from dist_train.study.page import number, write_page
from tests.study.written_runs import T, estimate, write_report, write_suite

HOSTILE = "</p><script>alert(1)</script> & <img src=x onerror=alert(2)>"


class Elements(HTMLParser):
    """All start tags of a page with their attributes, and whether each is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def claim(text: str, verdict: str, figure: str | None = None, **changes: Any) -> dict[str, Any]:
    measured = {"effect": 0.4132, "interval": [0.1, 0.7], "repetitions": 3, "where": "book", "unit": "nats", "note": ""}
    return {"id": text, "claim": text, "verdict": verdict, "figure": figure, **measured, **changes}


@pytest.fixture
def report(tmp_path: Path) -> dict[str, Any]:
    report = write_report(tmp_path / "runs", {"final token": 1, "all tokens": T})
    nothing: dict[str, Any] = {"effect": None, "interval": [None, None], "repetitions": 0, "where": ""}
    report["claims"] = [
        claim("It is <b>higher</b>", "supported", "losses"),
        claim("It is <b>higher</b>", "contradicted", "losses", where="web", effect=-1234.5),
        claim("It is <b>higher</b>", "supported", "equal", id="other", note="of another loss"),
        claim("It is slower", "undecided", "equal", interval=[None, None], repetitions=1),
        claim("It is better", "not measured", **nothing),
    ]
    losses = {"final_token_loss": estimate(2.5), "all_token_loss": estimate(3.5)}
    report["equal"] = [
        {"budget": budget, "group": name, "where": where, "at": amount, **losses}
        for budget, amount in (("updates", 200), ("FLOPs", 6.1e10))
        for where in ("book", "web")
        for name in ("final token", "all tokens")
    ]
    costs = {"updates": estimate(120), "supervised tokens": estimate(7680), "FLOPs": estimate(6e10), "seconds": None}
    report["needed"] = [
        {"loss": loss, "target": target, "where": "book", "group": name, **costs}
        for loss in losses
        for target in (2.9, 2.4)
        for name in ("final token", "all tokens")
    ]
    report["trade_off"]["rows"] = [{"property": "noise", "unit": "nats", "values": [estimate(0.25), None]}]
    return report


@pytest.fixture
def figure(tmp_path: Path) -> Figure:
    """Return a figure of one small panel."""
    import matplotlib.pyplot as plt

    paths = []
    for name in ("light", "dark"):
        with style(dark=name == "dark"):
            paths.append(save(plt.figure(figsize=(0.5, 0.4)), tmp_path / f"{name}.png", dpi=100))
    return Figure("It <falls>", "A caption.", [Picture('A "line"', *paths)])


@pytest.fixture
def page(report: dict[str, Any], figure: Figure, tmp_path: Path) -> str:
    return write_page(report, {"losses": figure}, tmp_path).read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """Return what can be read on a page, without its tags."""
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


# ---- one file --------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_nothing(page: str) -> None:
    elements = Elements(page)
    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in elements.found}
    for _, attributes in elements.found:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?://|url\(|@import", page)
    assert elements.open == []


def test_pictures_are_in_the_page_in_both_schemes(page: str, figure: Figure) -> None:
    elements = Elements(page)
    (image,), (source,) = elements.of("img"), elements.of("source")
    (panel,) = figure.panels
    for uri, path in ((image["src"], panel.light), (source["srcset"], panel.dark)):
        assert uri
        assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == path.read_bytes()
    assert source["media"] == "screen and (prefers-color-scheme: dark)"
    assert (image["width"], image["height"]) == ("50", "40")


def test_what_others_wrote_stays_text(report: dict[str, Any], figure: Figure, tmp_path: Path) -> None:
    for cell in report["cells"]:
        shown = [{"prompt": HOSTILE, "text": HOSTILE, "human": HOSTILE}]
        write_suite(Path(cell["folder"]), "text", {"model": {}, "human": {}, "samples": shown})
        cell["settings"]["sample.prompt"] = HOSTILE
    report["claims"] = [claim(HOSTILE, "supported", HOSTILE, where=HOSTILE, unit=HOSTILE, note=HOSTILE)]
    report["title"] = report["made"]["device"] = HOSTILE
    report["trade_off"]["columns"] = [HOSTILE, HOSTILE]
    found = {HOSTILE: figure._replace(title=HOSTILE, caption=HOSTILE, panels=[figure.panels[0]._replace(alt=HOSTILE)])}
    page = write_page(report, found, tmp_path).read_text(encoding="utf-8")
    assert not Elements(page).of("script")
    assert len(Elements(page).of("img")) == 1
    assert text_of(page).count(HOSTILE) > 15


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_each_claim_has_its_effect_interval_verdict_and_figure(page: str) -> None:
    said = text_of(page)
    measured = "supported 0.413 (0.100 … 0.700) book (3 pairs) contradicted −1,234 (0.100 … 0.700) web (3 pairs)"
    assert f"It is <b>higher</b> nats; see Figure 1 {measured}" in said
    # The same words about another measure are another claim.
    assert "It is <b>higher</b> nats; of another loss supported 0.413" in said
    # Its figure is not there.
    assert "It is slower nats undecided 0.413 (one seed: no interval) book (1 pair)" in said
    assert "It is better nats not measured –" in said
    assert "supported 2 contradicted 1 undecided 1 not measured 1" in said


def test_numbers_stand_in_the_place_of_adjectives_and_a_dash_where_there_are_none(page: str) -> None:
    assert "noise nats 0.250 0.150 … 0.350 –" in text_of(page)


def test_what_it_takes_to_reach_a_loss_is_listed_by_loss_and_target(page: str) -> None:
    read = text_of(page)
    rows = "final token 120 120 … 120 7,680 7,680 … 7,680 6.00 × 10¹⁰ 6.00 × 10¹⁰ … 6.00 × 10¹⁰ not reached"
    assert f"final token 2.90 nats {rows}" in read, read
    assert read.count("not reached") == 2 * 2 * 2


def test_losses_at_equal_cost_are_listed_by_budget(page: str) -> None:
    assert "FLOPs 6.10 × 10¹⁰ final token 2.50 2.40 … 2.60 3.50 3.40 … 3.60 all tokens 2.50" in text_of(page)


def test_samples_stand_beside_human_text(report: dict[str, Any], tmp_path: Path) -> None:
    for cell in report["cells"]:
        samples = [{"prompt": "Once upon", "text": f"x by {cell['objective']}", "human": " a time"}] * 5
        write_suite(Path(cell["folder"]), "text", {"model": {}, "human": {}, "samples": samples})
    said = text_of(write_page(report, {}, tmp_path).read_text(encoding="utf-8"))
    assert "… Once upon human a time final token x by final token all tokens x by all tokens" in said
    assert said.count("Once upon") == 3


def test_sections_without_content_are_left_out(tmp_path: Path) -> None:
    report = write_report(tmp_path / "runs", {"final token": 1})
    page = write_page(report, {}, tmp_path).read_text(encoding="utf-8")
    sections = [attributes["id"] for attributes in Elements(page).of("section")]
    assert sections == ["claims", "runs"]
    assert {link["href"] for link in Elements(page).of("a")} == {"#claims", "#runs"}


def test_it_says_what_was_run_for_how_long_and_how_to_do_it_again(page: str) -> None:
    said = text_of(page)
    assert "runs 4 training 1.5 minutes, evaluating and saving left out device cpu torch 2.13 date 2026-11-23" in said
    assert "python -m dist_train compare" in said


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (-0.4132, "−0.413"),
        (123.4, "123"),
        (1234.5, "1,234"),
        (2_560_000, "2,560,000"),
        (6.1e10, "6.10 × 10¹⁰"),
        (-3.2e-5, "−3.20 × 10⁻⁵"),
    ],
)
def test_numbers_have_three_digits_or_all_of_a_count(value: float, expected: str) -> None:
    assert number(value) == expected


# ---- for anybody -----------------------------------------------------------------------------------------------------


def test_headings_descend_one_level_at_a_time(page: str) -> None:
    levels = [int(tag[1]) for tag, _ in Elements(page).found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in itertools.pairwise(levels))


def test_language_descriptions_and_targets_are_there(page: str) -> None:
    elements = Elements(page)
    assert elements.of("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in elements.of("img"))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {str(link["href"])[1:] for link in elements.of("a")} <= set(ids)


def test_a_verdict_is_a_word_and_a_shape_beside_its_color(page: str) -> None:
    shapes = re.findall(
        r'<span class="verdict ([\w-]+)"><svg aria-hidden="true"><use href="#([\w-]+)"/></svg>(.+?)</', page
    )
    assert len(shapes) == 5 + 4
    assert all(color == shape == word.replace(" ", "-") for color, shape, word in shapes)
