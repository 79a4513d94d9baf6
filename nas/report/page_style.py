"""How the page of a report looks, and what it does in a browser: its style sheet and its own script."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #f6f7f9; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.15rem; margin: 0 0 .6rem; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 8px; padding: 1rem 1.2rem; margin: 1rem 0; }
.sub, .note { color: #5b6470; } .note { font-size: .9rem; margin: .4rem 0; }
.verdict { border-left: 5px solid #0072B2; font-size: 1.08rem; overflow-wrap: anywhere; }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin-top: 1rem; }
.card { border: 1px solid #e1e4e8; border-radius: 6px; padding: .4rem .9rem; min-width: 7rem; }
.card b { display: block; font-size: 1.15rem; } .card span { color: #5b6470; font-size: .85rem; }
.scroll { overflow: auto; max-height: 36rem; margin-top: .5rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .6rem; border-bottom: 1px solid #eceff2; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; box-shadow: 0 1px #c5cbd2; }
th button { all: unset; cursor: pointer; font-weight: 600; } th button:focus-visible { outline: 2px solid #0072B2; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td.text, th.text { text-align: left; }
td.wide { font: .8rem/1.4 ui-monospace, monospace; white-space: normal; min-width: 22rem; overflow-wrap: anywhere; }
tr.front td { background: #e8f2fa; } tr.baseline td { background: #fdeee4; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { color: #5b6470; white-space: nowrap; }
pre { background: #f6f8fa; padding: .7rem; overflow: auto; max-height: 28rem; font-size: .8rem; margin: .4rem 0; }
details { border-bottom: 1px solid #eceff2; padding: .35rem 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
"""

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const [id, figure] of Object.entries(figures)) {
  const place = document.getElementById(id);
  const flat = figure.data.every(trace => trace.type !== "parcoords");
  // Named one by one, because the default buttons of some versions include one that uploads the figure.
  const modeBarButtons = [["toImage", ...(flat ? ["zoom2d", "pan2d", "resetScale2d"] : [])]];
  const config = {responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons};
  Plotly.newPlot(place, figure.data, figure.layout, config)
    .catch(error => { place.textContent = "This figure cannot be drawn here: " + error; });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const value = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y);
    };
    table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  }));
}
"""
