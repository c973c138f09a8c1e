// Draws the curves of a report. Every figure comes from the page; none is asked for elsewhere.
"use strict";

(() => {
  const { short, calmRange, logRange, logSplits, lonePlaces, fillOf } = reportAxes;
  const byId = (id) => document.getElementById(id);
  const figures = JSON.parse(byId("figures").textContent);
  const runs = [...figures.runs, ...figures.bands];
  const isAlone = figures.runs.length === 1;
  const phases = ["data", "forward", "backward", "optimizer", "other"];
  const colours = 8;
  const dashes = [[], [6, 4], [2, 3]];
  const units = { steps: "steps", tokens: "tokens", hours: "hours of training", flops: "FLOPs" };

  const charts = [
    { id: "loss", title: "Loss", keys: ["loss"], isLoss: true, height: 360 },
    { id: "gradient_norm", title: "Gradient norm, before clipping", keys: ["gradient_norm"] },
    { id: "learning_rate", title: "Learning rate", keys: ["learning_rate"] },
    { id: "tokens_per_s", title: "Tokens a second, all ranks", keys: ["tokens_per_s"] },
    { id: "mfu", title: "Model-FLOPs utilisation, %", keys: ["mfu"] },
    { id: "mfu_of_matmul", title: "Speed against a measured matrix product, %", keys: ["mfu_of_matmul"] },
    {
      id: "seconds",
      title: isAlone ? "Seconds a step, and of its parts" : "Seconds a step",
      keys: isAlone ? ["step_s", ...phases] : ["step_s"],
    },
    { id: "memory", title: "Peak memory of rank 0, GB", keys: ["memory"] },
  ].filter((chart) => runs.some((run) => chart.keys.some((key) => isDrawn(run.series[key]))));

  function isDrawn(series) {
    return series !== undefined && series.mean.some((value) => value !== null);
  }

  const canBeBits = figures.runs.every(
    (run) => run.bytes_per_token !== null && run.validation_bytes_per_token !== null,
  );
  const hidden = new Set();
  const drawn = new Map();

  // What the controls say

  function state() {
    return {
      axis: byId("axis").value,
      isBits: byId("unit").value === "bits",
      smoothing: Number(byId("smoothing").value),
      isLog: byId("log").checked,
      isCalm: byId("calm").checked,
      hasMarks: byId("marks").checked,
    };
  }

  function colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  }

  // Figures as they are drawn

  function xOf(where, run, axis, isLine = true) {
    const values = axis === "flops" ? where.tokens.map((n) => n * run.flops_per_token) : where[axis];
    if (!isLine) return values;
    const xs = [];
    // A skipped step takes no time: its place is a hair behind the one before.
    for (const value of values) {
      const least = xs.length ? xs[xs.length - 1] : -Infinity;
      xs.push(value > least ? value : least + Math.abs(least) * 1e-9 + 1e-12);
    }
    return xs;
  }

  function scaled(values, factor, isLog) {
    return values.map((value, i) => {
      const own = Array.isArray(factor) ? factor[i] : factor;
      if (value === null || own === null || (isLog && value <= 0)) return null;
      return value * own;
    });
  }

  // The mean over a window around each value; the slider's end is a tenth of the run each way. At
  // the beginning, where curves are steep, it reaches as far ahead as back.
  function smoothed(values, smoothing) {
    const reach = Math.round((smoothing / 100) ** 2 * 0.1 * values.length);
    if (reach === 0) return values;
    const sums = [0];
    const counts = [0];
    values.forEach((value, i) => {
      sums.push(sums[i] + (value ?? 0));
      counts.push(counts[i] + (value === null ? 0 : 1));
    });
    return values.map((value, i) => {
      if (value === null) return null;
      const from = i - Math.min(reach, i);
      const to = i + Math.min(reach, i, values.length - 1 - i) + 1;
      return (sums[to] - sums[from]) / (counts[to] - counts[from]);
    });
  }

  // Of a run of several data sets, the factor of each point; null where its bytes aren't known.
  function perUnit(bytesPerToken, isBits) {
    if (isBits && Array.isArray(bytesPerToken)) {
      return bytesPerToken.map((ratio) => (ratio ? 1 / (Math.LN2 * ratio) : null));
    }
    return isBits && bytesPerToken ? 1 / (Math.LN2 * bytesPerToken) : 1;
  }

  // The lines of a chart: a table of x and y for each, its look, and its name in the legend.
  function linesOf(chart, now) {
    const lines = [];
    runs.forEach((run, number) => {
      if (hidden.has(run.name)) return;
      const x = xOf(run.places, run, now.axis);
      chart.keys.forEach((key, part) => {
        const series = run.series[key];
        if (!isDrawn(series)) return;
        const factor = chart.isLoss ? perUnit(run.bytes_per_token, now.isBits) : 1;
        const hue = `c${(chart.keys.length > 1 ? part : number) % colours}`;
        const dash = dashes[Math.floor(number / colours) % dashes.length];
        const name = chart.keys.length > 1 ? (key === "step_s" ? "whole step" : key) : run.name;
        const mean = scaled(series.mean, factor, now.isLog);
        const line = { name, hue, dash, x, y: smoothed(mean, now.smoothing), width: 1.75 };
        if (series.low) {
          line.low = scaled(series.low, factor, now.isLog);
          line.high = scaled(series.high, factor, now.isLog);
        } else if (line.y !== mean) {
          line.raw = mean;
        }
        lines.push(line);
      });
      if (chart.isLoss && run.validation_loss.length) {
        const factor = perUnit(run.validation_bytes_per_token, now.isBits);
        lines.push({
          name: `${run.name}, validation`,
          hue: `c${(isAlone ? 1 : number) % colours}`,
          dash: [4, 3],
          x: xOf(run.validations, run, now.axis),
          y: scaled(run.validation_loss, factor, now.isLog),
          width: 1.5,
          hasPoints: true,
        });
      }
    });
    return lines;
  }

  // Charts

  function optionsOf(chart, lines, now, width) {
    const ink = colour("quiet");
    const grid = { stroke: colour("line"), width: 1 };
    const series = [{}];
    const bands = [];
    for (const line of lines) {
      const stroke = colour(line.hue);
      if (line.low) {
        const edge = `${stroke}${isAlone ? "66" : "40"}`;
        series.push({ stroke: edge, width: 0.5, points: { show: false } });
        series.push({ stroke: edge, width: 0.5, points: { show: false } });
        bands.push({ series: [series.length - 1, series.length - 2], fill: `${stroke}2e` });
      }
      if (line.raw) series.push({ stroke: `${stroke}59`, width: 1, points: { show: false } });
      line.index = series.length;
      const filter = line.hasPoints ? undefined : (plot, index) => lonePlaces(plot.data[index]);
      const points = { show: true, size: 5, fill: stroke, ...(filter ? { filter } : {}) };
      series.push({ stroke, width: line.width, dash: line.dash, points });
    }
    const axis = { stroke: ink, grid, ticks: grid, values: (_, splits) => splits.map(axisWords) };
    return {
      width,
      height: chart.height ?? 240,
      legend: { show: false },
      cursor: { y: false, sync: { key: "report", scales: ["x", null] }, points: { size: 6 } },
      scales: {
        x: { time: false, range: (_, least, most) => (least === most ? [least * 0.9, most * 1.1 + 1e-9] : [least, most]) },
        y: {
          ...(now.isLog ? { distr: 3, range: (_, least, most) => logRange(least, most) } : {}),
          ...(now.isCalm ? { range: calmRange(lines) } : {}),
        },
      },
      axes: [
        { ...axis, label: units[now.axis], labelSize: 20, size: 34 },
        { ...axis, size: 62, ...(now.isLog ? logAxis : {}) },
      ],
      series,
      bands,
      hooks: { draw: [(plot) => drawMarks(plot, now)], setCursor: [(plot) => tell(chart, plot)] },
    };
  }

  const logAxis = {
    splits: (_plot, _axis, least, most) => logSplits(least, most),
    filter: (_plot, splits) => splits,
  };

  // uPlot leaves out labels of a log axis by giving null.
  function axisWords(value) {
    return value === null ? "" : short(value);
  }

  function drawMarks(plot, now) {
    if (!now.hasMarks) return;
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    for (const run of runs) {
      if (hidden.has(run.name)) continue;
      const xs = xOf(run.marks.places, run, now.axis, false);
      run.marks.kinds.forEach((kind, number) => {
        const at = plot.valToPos(xs[number], "x", true);
        if (at < bbox.left || at > bbox.left + bbox.width) return;
        ctx.strokeStyle = colour(kind);
        ctx.beginPath();
        ctx.moveTo(at, bbox.top);
        // A checkpoint is a tick at the foot; what was out of the ordinary stands full height.
        const foot = bbox.top + bbox.height;
        ctx.lineTo(at, foot);
        if (kind === "checkpoint") {
          ctx.beginPath();
          ctx.setLineDash([]);
          ctx.moveTo(at, foot);
          ctx.lineTo(at, foot - 10 * devicePixelRatio);
        }
        ctx.stroke();
        ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      });
    }
    ctx.restore();
  }

  // The value of each line where the cursor is, or the last one.
  function tell(chart, plot) {
    const own = drawn.get(chart.id);
    if (!own) return;
    const at = plot.cursor.idx;
    for (const line of own.lines) {
      const values = plot.data[line.index];
      let row = at ?? values.length - 1;
      while (row > 0 && (values[row] === undefined || values[row] === null)) row -= 1;
      line.cell.textContent = short(values[row]);
      if (line.low && at !== null && at !== undefined) {
        const low = plot.data[line.index - 2][row];
        const high = plot.data[line.index - 1][row];
        line.cell.textContent += ` (${short(low)} to ${short(high)})`;
      }
    }
    const x = at === null || at === undefined ? null : plot.data[0][at];
    own.place.textContent = x === null ? "at the end: " : `at ${short(x)} ${units[state().axis]}: `;
  }

  function keysOf(lines) {
    const list = document.createElement("ul");
    list.className = "legend";
    const place = document.createElement("li");
    list.append(place);
    for (const line of lines) {
      const item = document.createElement("li");
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = fillOf(colour(line.hue), line.dash);
      line.cell = document.createElement("b");
      item.append(key, `${line.name} `, line.cell);
      list.append(item);
    }
    return { list, place };
  }

  function figureOf(chart) {
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const plot = document.createElement("div");
    figure.id = `chart-${chart.id}`;
    plot.className = "plot";
    plot.tabIndex = 0;
    plot.setAttribute("role", "group");
    plot.setAttribute("aria-label", `Chart: ${chart.title}`);
    plot.addEventListener("keydown", (event) => pressed(chart, event));
    figure.append(caption, plot);
    byId("charts").append(figure);
    chart.figure = figure;
    chart.caption = caption;
    chart.plot = plot;
  }

  function draw(chart) {
    const now = state();
    const lines = linesOf(chart, now);
    drawn.get(chart.id)?.plot.destroy();
    drawn.get(chart.id)?.list.remove();
    const unit = now.isBits ? "bits per byte" : "nats a token";
    chart.caption.textContent = chart.isLoss ? `${chart.title}, ${unit}` : chart.title;
    const tables = lines.map((line) => {
      const columns = [line.x];
      if (line.low) columns.push(line.low, line.high);
      if (line.raw) columns.push(line.raw);
      return [...columns, line.y];
    });
    const data = tables.length ? uPlot.join(tables) : [[]];
    const { list, place } = keysOf(lines);
    chart.figure.append(list);
    const width = Math.max(200, chart.plot.clientWidth);
    const plot = new uPlot(optionsOf(chart, lines, now, width), data, chart.plot);
    drawn.set(chart.id, { plot, lines, list, place });
    tell(chart, plot);
  }

  function drawAll() {
    charts.forEach(draw);
  }

  // By keyboard

  function pressed(chart, event) {
    const { plot } = drawn.get(chart.id);
    const last = plot.data[0].length - 1;
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -20, PageDown: 20, Home: -last, End: last };
    if (event.key in steps) {
      const row = Math.min(last, Math.max(0, (plot.cursor.idx ?? last) + steps[event.key]));
      plot.setCursor({ left: plot.valToPos(plot.data[0][row], "x"), top: 0 });
    } else if (event.key === "+" || event.key === "-") {
      const { min, max } = plot.scales.x;
      const middle = plot.data[0][plot.cursor.idx ?? Math.floor(last / 2)];
      const half = ((max - min) / 2) * (event.key === "+" ? 0.5 : 2);
      plot.setScale("x", {
        min: Math.max(plot.data[0][0], middle - half),
        max: Math.min(plot.data[0][last], middle + half),
      });
    } else {
      return;
    }
    event.preventDefault();
  }

  // Controls

  function setUp() {
    const unit = byId("unit");
    if (!canBeBits) unit.querySelector("[value=bits]").remove();
    if (figures.is_bits_only) unit.querySelector("[value=nats]").remove();
    for (const id of ["axis", "unit", "log", "calm", "marks"]) byId(id).addEventListener("change", drawAll);
    byId("smoothing").addEventListener("input", () => {
      const value = byId("smoothing").value;
      byId("smoothing").setAttribute("aria-valuetext", value === "0" ? "none" : `${value} %`);
      drawAll();
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    if (runs.length > 1) byId("controls").after(choiceOfRuns());
    if (figures.steps_in_a_group > 1) {
      byId("about-groups").textContent =
        `A point stands for ${figures.steps_in_a_group} steps: the line is their mean, the shade ` +
        "reaches from the least to the greatest, so no spike is lost.";
    }
    charts.forEach(figureOf);
    drawAll();
    new ResizeObserver(() => {
      for (const chart of charts) {
        const { plot } = drawn.get(chart.id);
        const width = Math.max(200, chart.plot.clientWidth);
        if (width !== plot.width) plot.setSize({ width, height: plot.height });
      }
    }).observe(byId("charts"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    addEventListener("beforeprint", drawAll);
    addEventListener("afterprint", drawAll);
  }

  function choiceOfRuns() {
    const set = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = "Runs";
    set.append(legend);
    runs.forEach((run, number) => {
      const label = document.createElement("label");
      const box = document.createElement("input");
      const key = document.createElement("span");
      key.className = "key";
      key.style.background = `var(--c${number % colours})`;
      box.type = "checkbox";
      box.checked = true;
      box.addEventListener("change", () => {
        if (box.checked) hidden.delete(run.name);
        else hidden.add(run.name);
        drawAll();
      });
      label.append(box, " ", key, run.name);
      set.append(label);
    });
    return set;
  }

  setUp();
})();
