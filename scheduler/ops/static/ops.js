// Draws the chart from the table that has the same numbers, and says so when the front door does not answer.
// Everything else is htmx: it asks for the page's fragments every few seconds.
"use strict";

(() => {
  const byId = (id) => document.getElementById(id);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const clock = (seconds) => new Date(seconds * 1000).toISOString().slice(11, 16);

  // -- the chart ---------------------------------------------------------------------------------

  let chart = null;
  let drawn = "";

  // Columns of the table, oldest first: seconds since 1970, then each use; null where nothing is known.
  const columns = () => {
    const uses = [...document.querySelectorAll("#minutes-table th[data-use]")].map((each) => each.dataset.use);
    const rows = [...document.querySelectorAll("#minutes-table tr[data-at]")].reverse();
    const values = rows.map((row) => [...row.querySelectorAll("td")].map((cell) => Number.parseFloat(cell.textContent)));
    const of = (index) => values.map((row) => (Number.isNaN(row[index]) ? null : row[index]));
    return { uses, at: rows.map((row) => Number(row.dataset.at)), values: uses.map((_, index) => of(index)) };
  };

  // Each bar reaches from the ground to the top of its use; those below are drawn over it.
  const stacked = (values) => {
    const tops = [];
    values.forEach((one, index) =>
      tops.push(one.map((value, at) => (value === null ? null : value + (index ? tops[index - 1][at] : 0)))));
    return tops.reverse();
  };

  const options = (uses, at, width) => {
    const axis = { stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { show: false } };
    const bars = uPlot.paths.bars({ size: [0.85, 24], align: 1 });
    return {
      width,
      height: 240,
      legend: { show: false },
      cursor: { show: false },
      scales: {
        x: { time: false, range: () => [at[0], at[at.length - 1] + 60] },
        y: { range: (_, low, high) => [0, Math.max(1, Math.ceil(high * 1.05))] },
      },
      axes: [
        { ...axis, size: 26, grid: { show: false }, values: (_, splits) => splits.map(clock), incrs: [300, 600, 900, 1800, 3600] },
        { ...axis, label: "GPUs", labelSize: 18, size: 34 },
      ],
      series: [{}, ...[...uses].reverse().map((use) => ({
        label: use, fill: colour(use), stroke: colour(use), width: 0, paths: bars, points: { show: false },
      }))],
    };
  };

  const draw = (anew) => {
    const box = byId("chart");
    const { uses, at, values } = columns();
    const known = values.some((one) => one.some((value) => value !== null));
    box.hidden = !known;
    if (!known) return;
    const data = [at, ...stacked(values)];
    const now = JSON.stringify(data);
    if (now === drawn && !anew) return;
    drawn = now;
    if (chart !== null) chart.destroy();
    chart = new uPlot(options(uses, at, box.clientWidth), data, box);
  };

  // -- what the refresh does ---------------------------------------------------------------------

  // What is the same stays: nothing is read out again, and a selection is not lost.
  document.addEventListener("htmx:oobBeforeSwap", (event) => {
    if (event.detail.target.innerHTML === event.detail.fragment.innerHTML) event.detail.shouldSwap = false;
  });

  let answered = Date.now();
  const answers = (yes) => {
    const lost = byId("lost");
    if (yes) answered = Date.now();
    byId("lost-since").textContent = new Date(answered).toISOString().slice(11, 19);
    if (lost.hidden !== yes) lost.hidden = yes;
  };
  document.addEventListener("htmx:afterRequest", (event) => {
    answers(event.detail.successful);
    if (event.detail.successful) draw(false);
  });

  byId("still").hidden = true;
  draw(false);
  new ResizeObserver(() => {
    const width = byId("chart").clientWidth;
    if (chart !== null && width && width !== chart.width) chart.setSize({ width, height: 240 });
  }).observe(byId("chart"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(true));
})();
