// Parallel coordinates, one axis below the other, so that names stay readable on a telephone. Positions are 0 to 1000.
function parallelCoordinates(root, {axes, trials, candidates, front, begin}, {onChoose, onFilter}) {
  const ROW = 58, TOP = 32, SIDE = 14, REACH = 12, num = axes.length, ofTrial = num - 2;  // the last two are per candidate
  const canvas = root.querySelector("canvas"), [says, clear] = root.parentElement.querySelectorAll("output, .passing button");
  const lines = new Map(trials.map((_, index) => [index, []])), onFront = new Set(front), brushes = axes.map(() => null);
  candidates.forEach(([trial], index) => lines.get(trial).push(index));
  let passing = candidates.map((_, index) => index), chosen = -1, width = 0;

  const y = (axis) => TOP + axis * ROW;
  const x = (position) => SIDE + (width - 2 * SIDE) * position / 1000;
  const position = (axis, index) => axes[axis].at[axis < ofTrial ? candidates[index][0] : index];
  const within = (axis, at) => !brushes[axis] || (brushes[axis][0] <= at && at <= brushes[axis][1]);
  const passes = (index) => axes.every((_, axis) => within(axis, position(axis, index)));
  const trialPasses = (trial) => axes.every(({at}, axis) => axis < ofTrial ? within(axis, at[trial]) : !brushes[axis]);

  function stroke(pen, points, colour, alpha, thick) {
    pen.strokeStyle = colour;
    pen.globalAlpha = alpha;
    pen.lineWidth = thick;
    pen.beginPath();
    points.forEach(([at, axis], index) => index ? pen.lineTo(x(at), y(axis)) : pen.moveTo(x(at), y(axis)));
    pen.stroke();
  }
  const whole = (index) => axes.map((_, axis) => [position(axis, index), axis]);

  function draw() {
    const scale = Math.max(2, devicePixelRatio), pen = canvas.getContext("2d");
    width = root.clientWidth;
    canvas.width = width * scale;
    canvas.height = (y(num - 1) + 34) * scale;
    pen.scale(scale, scale);
    pen.lineJoin = "round";
    const shown = new Set(passing), faint = Math.min(0.55, Math.max(0.05, 50 / passing.length));
    for (const [trial, own] of lines) {
      const isOn = own.length ? own.some((index) => shown.has(index)) : trialPasses(trial), alpha = isOn ? faint : 0.025;
      stroke(pen, axes.slice(0, ofTrial).map(({at}, axis) => [at[trial], axis]), "#64748b", alpha, 1);
      for (const index of own) {
        stroke(pen, whole(index).slice(Math.max(0, ofTrial - 1)), "#64748b", shown.has(index) ? faint : 0.025, 1);
      }
    }
    for (const index of front.filter((index) => shown.has(index))) stroke(pen, whole(index), "#2563eb", 0.8, 1.6);
    if (chosen >= 0) stroke(pen, whole(chosen), "#be185d", 1, 3);
  }

  function filter() {
    passing = candidates.map((_, index) => index).filter(passes);
    const isFiltered = brushes.some(Boolean);
    axes.forEach(({ticks}, axis) => {
      const slider = root.querySelectorAll(".axis")[axis], [low, high] = brushes[axis] ?? [0, 1000];
      const brush = slider.querySelector(".brush");
      const near = (end) => ticks.toSorted((one, other) => Math.abs(one[0] - end) - Math.abs(other[0] - end))[0][1];
      brush.hidden = !brushes[axis];
      brush.style.left = `${x(low)}px`;
      brush.style.width = `${x(high) - x(low)}px`;
      slider.setAttribute("aria-valuenow", Math.round(low));
      slider.setAttribute("aria-valuetext", brushes[axis] ? `about ${near(low)} to ${near(high)}` : "all");
    });
    clear.hidden = !isFiltered;
    says.textContent = isFiltered ? `${passing.length} of ${candidates.length} candidates pass.` : `${candidates.length} candidates.`;
    requestAnimationFrame(draw);
  }
  const filtered = () => {
    filter();
    onFilter(brushes.some(Boolean) ? new Set(passing.map((index) => `${trials[candidates[index][0]]}/${candidates[index][1]}`)) : null);
  };

  function choose(index) {
    onChoose(trials[candidates[index][0]], candidates[index][1]);
  }

  function nearest(atX, atY) {
    const above = Math.min(num - 2, Math.max(0, Math.floor((atY - TOP) / ROW))), share = (atY - y(above)) / ROW;
    const away = (index) => Math.abs(atX - x(position(above, index)) * (1 - share) - x(position(above + 1, index)) * share);
    // lines of one trial lie on each other: first one on the frontier, then the last round
    const best = passing.toSorted((one, other) => away(one) - away(other) || onFront.has(other) - onFront.has(one) || other - one)[0];
    return best !== undefined && away(best) <= REACH ? best : -1;
  }

  axes.forEach(({name, ticks}, axis) => {
    const slider = document.createElement("div"), label = document.createElement("b"), line = document.createElement("i");
    const brush = document.createElement("span");
    slider.className = "axis";
    slider.style.top = `${y(axis)}px`;
    slider.tabIndex = 0;
    for (const [key, value] of Object.entries({role: "slider", "aria-label": name, "aria-valuemin": 0, "aria-valuemax": 1000})) {
      slider.setAttribute(key, value);
    }
    label.textContent = name;
    line.style.left = `calc(${SIDE}px + (100% - ${2 * SIDE}px) * ${begin / 1000})`;
    brush.className = "brush";
    slider.append(line, brush, label);
    for (const [at, text] of ticks) {
      const tick = document.createElement("span");
      tick.className = "tick";
      tick.style.left = `calc(${SIDE}px + (100% - ${2 * SIDE}px) * ${at / 1000})`;
      tick.textContent = text;
      if (at < 40) tick.style.transform = `translateX(-${SIDE}px)`;
      if (at > 960) tick.style.transform = `translateX(calc(${SIDE}px - 100%))`;
      slider.append(tick);
    }
    let from = null, had = null;
    const where = (event) => Math.min(1000, Math.max(0, (event.clientX - root.getBoundingClientRect().left - SIDE) / (width - 2 * SIDE) * 1000));
    slider.onpointerdown = (event) => {
      slider.setPointerCapture(event.pointerId);
      [from, had, brushes[axis]] = [where(event), brushes[axis], null];
    };
    slider.onpointermove = (event) => {
      if (from === null || Math.abs(where(event) - from) * width < 4000) return;
      brushes[axis] = [from, where(event)].sort((one, other) => one - other);
      filter();
    };
    slider.onpointerup = slider.onpointercancel = () => {
      if (from === null) return;
      from = null;
      if (had || brushes[axis]) filtered();
    };
    slider.onkeydown = (event) => {
      const [low, high] = brushes[axis] ?? [0, 0], step = {ArrowRight: 1, ArrowLeft: -1}[event.key], wider = {ArrowUp: 1, ArrowDown: -1}[event.key];
      if (step) {
        const moved = Math.max(-low, Math.min(1000 - high, 50 * step));
        brushes[axis] = brushes[axis] ? [low + moved, high + moved] : [0, 250];
      } else if (wider) {
        brushes[axis] = [low, Math.max(low + 50, Math.min(1000, high + 50 * wider))];
      } else if (["Escape", "Delete", "Backspace"].includes(event.key)) {
        brushes[axis] = null;
      } else return;
      event.preventDefault();
      filtered();
    };
    root.append(slider);
  });

  canvas.onclick = (event) => {
    const index = nearest(event.offsetX, event.offsetY);
    if (index >= 0) choose(index);
  };
  canvas.onkeydown = (event) => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step || !passing.length) return;
    event.preventDefault();
    const at = passing.indexOf(chosen);
    choose(passing[at < 0 ? 0 : (at + step + passing.length) % passing.length]);
  };
  clear.onclick = () => {
    brushes.fill(null);
    filtered();
  };
  root.style.height = `${y(num - 1) + 34}px`;
  new ResizeObserver(filter).observe(root);
  const scale = ({name, ticks}) => JSON.stringify([name, ticks]);  // on another one a brush would hold other values
  return {
    brushes: () => Object.fromEntries(axes.flatMap((axis, index) => brushes[index] ? [[scale(axis), brushes[index]]] : [])),
    brush(kept) {
      axes.forEach((axis, index) => { brushes[index] = kept[scale(axis)] ?? null; });
      if (brushes.some(Boolean)) filtered();
    },
    show(trial, round) {
      chosen = candidates.findIndex(([of, depth]) => trials[of] === trial && depth === round);
      requestAnimationFrame(draw);
    },
  };
}
