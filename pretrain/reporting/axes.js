// The axes of a report's charts: numbers as people read them, and scales that fit their curves.
"use strict";

const reportAxes = (() => {
  // Numbers as people read them
  function short(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2).replace(/\.?0*e\+?/, "e");
    for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (size >= unit) return `${Number((value / unit).toPrecision(4))} ${name}`;
    }
    return String(Number(value.toPrecision(5)));
  }

  // Where all but one in a hundred of the values lie; the spikes beyond are cut by the frame.
  function calmRange(lines) {
    const values = lines.flatMap((line) => line.y.filter((value) => value !== null));
    values.sort((a, b) => a - b);
    if (values.length === 0) return [0, 1];
    const at = (share) => values[Math.round(share * (values.length - 1))];
    const margin = 0.05 * (at(0.995) - at(0.005)) || Math.abs(at(0.5)) * 0.1 || 1;
    const low = at(0.005) - margin;
    return [low <= 0 && values[0] > 0 ? values[0] / 2 : low, at(0.995) + margin];
  }

  // From the least to the greatest and a little beyond: whole powers of ten would leave most of a
  // chart empty.
  function logRange(least, most) {
    if (!(least > 0)) return [0.1, 1];
    const margin = Math.max((most / least) ** 0.05, 1.02);
    return [least / margin, most * margin];
  }

  // Every 1, 2 and 5 of each power of ten or, where that is one or two, round numbers evenly spaced.
  function logSplits(least, most) {
    const found = [];
    for (let power = Math.floor(Math.log10(least)); power <= Math.log10(most); power += 1) {
      for (const digit of [1, 2, 5]) found.push(Number(`${digit}e${power}`));
    }
    const inside = found.filter((value) => value >= least && value <= most);
    if (inside.length > 9) return inside.filter((value) => Number.isInteger(Number(Math.log10(value).toFixed(9))));
    return inside.length > 3 ? inside : evenSplits(least, most);
  }

  function evenSplits(least, most) {
    const power = Math.floor(Math.log10((most - least) / 5));
    const steps = [1, 2, 5, 10].map((digit) => Number(`${digit}e${power}`));
    const step = steps.find((size) => (most - least) / size <= 6);
    const found = [];
    for (let number = Math.ceil(least / step); number * step <= most; number += 1) {
      found.push(Number((number * step).toPrecision(6)));
    }
    return found;
  }

  // Places of the values with none on either side, which no line through them shows; undefined is a
  // place of another line alone.
  function lonePlaces(values) {
    const lone = [];
    let before = null;
    let last = -1;
    let beforeLast = null;
    for (let place = 0; place <= values.length; place += 1) {
      const value = place < values.length ? values[place] : null;
      if (value === undefined) continue;
      if (before !== null && beforeLast === null && value === null) lone.push(last);
      beforeLast = before;
      before = value;
      last = place;
    }
    return lone;
  }

  // A line's swatch in a legend: dashed as the line is.
  function fillOf(stroke, dash) {
    if (!dash || dash.length === 0) return stroke;
    const [on, off] = dash;
    return `repeating-linear-gradient(90deg, ${stroke} 0 ${on}px, transparent ${on}px ${on + off}px)`;
  }

  return { short, calmRange, logRange, logSplits, lonePlaces, fillOf };
})();
