const data = JSON.parse(document.getElementById("data").textContent);
// a double click that resets would go back to the range that the figure opened with
const config = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "autosize"};
const plots = {};
const zoomed = {};  // by figure: the ranges that a reader chose
let chosen = [], lines = null;

function command(says, line) {
  const row = document.createElement("p"), label = document.createElement("span"), code = document.createElement("code");
  row.className = "command";
  code.tabIndex = 0;
  label.textContent = says;
  code.textContent = line;
  row.append(label, code);
  return row;
}

function plain(html) {
  return new DOMParser().parseFromString(html.replaceAll("<br>", " "), "text/html").body.textContent;
}

function choose(trial, round) {
  const name = `${trial}/${round}`, text = data.texts[trial];
  if (!text || !round) return;
  const [asked, ended] = text.split("<br><i>").map(plain), title = document.createElement("p");
  title.textContent = `Trial ${trial}, round ${round}${ended ? ` (${ended})` : ""}`;
  const rows = [title];
  if (data.reported.includes(name)) {
    rows.push(command("choose it", `raysearch pick ${data.directory} --candidate ${name}`));
  } else {
    rows.push(command("not scored on the report split, by which a pick is judged; items beside dense",
                      `raysearch compare ${data.directory} dense ${name}`));
  }
  const given = asked.startsWith("--") ? asked : `--actions ${data.trial.replace("NUMBER", String(trial).padStart(5, "0"))}`;
  rows.push(command(`run its trial again, which has it after round ${round}`, `${data.prune} ${given} --out again`));
  for (const box of document.querySelectorAll(".chosen")) box.replaceChildren(...rows.map((row) => row.cloneNode(true)));
  chosen = [trial, round];
  lines?.show(trial, round);
  mark();
}

// In every figure a ring around the chosen candidate: a shape, for which Plotly draws no point again
function mark() {
  for (const plot of Object.values(plots)) {
    const shapes = (plot.layout.shapes ?? []).filter(({name}) => name !== "chosen");
    for (const {visible, customdata, x, y} of plot._fullData) {
      const isChosen = ([trial, round]) => trial === chosen[0] && round === chosen[1];
      const at = visible === true && customdata ? Array.from(customdata).findIndex(isChosen) : -1;
      if (at >= 0 && !Number.isNaN(x[at])) {
        shapes.push({name: "chosen", type: "circle", xsizemode: "pixel", ysizemode: "pixel", xanchor: x[at], yanchor: y[at],
                     x0: -10, x1: 10, y0: -10, y1: 10, line: {color: "#be185d", width: 3}});
        break;
      }
    }
    Plotly.relayout(plot, {shapes});
  }
}

// What does not pass the filter of the lines becomes pale
function dim(passing) {
  for (const plot of Object.values(plots)) {
    const named = plot.data.map((_, index) => index).filter((index) => plot.data[index].customdata);
    const kept = named.map((index) => passing && Array.from(plot._fullData[index].customdata ?? []).flatMap(
      ([trial, round], at) => !round || passing.has(`${trial}/${round}`) ? [at] : []));
    Plotly.restyle(plot, {selectedpoints: kept}, named);
  }
}

async function draw() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  (0, eval)(await new Response(unpacked).text());
  for (const [name, figure] of Object.entries(data.figures)) {
    const plot = document.getElementById(name), [menu] = figure.layout.updatemenus ?? [];
    delete figure.layout.updatemenus;
    figure.layout.margin.t = 40;
    for (const trace of figure.data) trace.text = trace.text?.map((of) => data.texts[of] ?? of);
    plot.textContent = "";
    const isOfCandidates = figure.data.some((trace) => trace.customdata);
    for (const trace of isOfCandidates ? figure.data : []) trace.unselected = {marker: {opacity: 0.1}};
    await Plotly.newPlot(plot, figure.data, figure.layout, config);
    if (isOfCandidates) plots[name] = plot;
    plot.on("plotly_click", ({points: [point]}) => choose(point.customdata?.[0], point.customdata?.[1]));
    plot.on("plotly_relayout", (change) => { if (/axis/.test(Object.keys(change))) zoomed[name] = change; });
    for (const [index, {label, args}] of (menu?.buttons ?? []).entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.setAttribute("aria-pressed", index === 0);
      button.onclick = async () => {
        for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
        delete zoomed[name];
        await Plotly.update(plot, ...args);
        mark();
      };
      document.querySelector(`[data-for="${name}"]`).append(button);
    }
  }
}

if (data.parallel) {
  lines = parallelCoordinates(document.getElementById("parallel"), data.parallel, {onChoose: choose, onFilter: dim});
}

for (const table of document.querySelectorAll("table")) {  // on a telephone a row is a card, whose cells say what they are
  const names = [...table.querySelectorAll("th")].map((cell) => cell.textContent);
  for (const row of table.tBodies[0].rows) [...row.cells].forEach((cell, index) => { cell.dataset.label = names[index]; });
}

for (const button of document.querySelectorAll("[data-candidate]")) {
  button.onclick = () => {
    choose(...button.dataset.candidate.split("/").map(Number));
    document.querySelector(".chosen").scrollIntoView({block: "nearest"});
  };
}

// A page that is read again stays as its reader left it
const all = (selector) => [...document.querySelectorAll(selector)];
const nameOf = (node) => `${node.closest("[data-for]")?.dataset.for} ${node.ariaLabel ?? node.textContent}`;

function readAgain() {
  if (getSelection().type === "Range") return;  // somebody copies a command
  history.replaceState({chosen, zoomed, scrolled: scrollY, brushes: lines?.brushes(),
                        pressed: all('[aria-pressed="true"]').map(nameOf),
                        focused: all("button:focus, [tabindex]:focus").map(nameOf)}, "");
  location.reload();
}

async function restore(left) {
  choose(...left.chosen);
  await drawn;
  const buttons = all('[aria-pressed="false"]').filter((button) => left.pressed.includes(nameOf(button)));
  for (const button of buttons) await button.onclick();
  for (const [name, ranges] of Object.entries(left.zoomed)) if (data.figures[name]) await Plotly.relayout(name, ranges);
  lines?.brush(left.brushes ?? {});
  mark();
  all("button, [tabindex]").find((node) => left.focused.includes(nameOf(node)))?.focus({preventScroll: true});
  scrollTo(0, left.scrolled);  // the browser went there before the figures had their buttons
}

const drawn = draw(), restored = history.state ? restore(history.state) : drawn;
if (document.body.dataset.againS) restored.then(() => setInterval(readAgain, 1000 * document.body.dataset.againS));
