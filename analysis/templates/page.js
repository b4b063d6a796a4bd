const data = JSON.parse(document.getElementById("data").textContent);
// a double click that resets would go back to the range that the figure opened with
const config = {responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "autosize"};
const plots = {};
let chosen = [], passing = null, lines = null;

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

// In every figure a ring around the chosen candidate, and what does not pass the filter pale
function mark() {
  for (const plot of Object.values(plots)) {
    const named = plot.data.map((_, index) => index).filter((index) => plot.data[index].customdata);
    const points = named.map((index) => Array.from(plot._fullData[index].customdata ?? []));
    let ring = [[], []];
    for (const [number, index] of named.entries()) {
      const trace = plot._fullData[index], at = points[number].findIndex(([trial, round]) => trial === chosen[0] && round === chosen[1]);
      if (trace.visible === true && at >= 0) ring = [[trace.x[at]], [trace.y[at]]];
    }
    Plotly.restyle(plot, {x: [ring[0]], y: [ring[1]]}, [plot.data.length - 1]);
    const kept = points.map((of) => passing && [...of.keys()].filter((at) => !of[at][1] || passing.has(`${of[at][0]}/${of[at][1]}`)));
    Plotly.restyle(plot, {selectedpoints: kept}, named);
  }
}

async function draw() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (one) => one.charCodeAt(0));
  const unpacked = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  (0, eval)(await new Response(unpacked).text());
  for (const [name, figure] of Object.entries(data.figures)) {
    const plot = document.getElementById(name), [menu] = figure.layout.updatemenus ?? [], every = figure.data.map((_, index) => index);
    delete figure.layout.updatemenus;
    figure.layout.margin.t = 40;
    for (const trace of figure.data) trace.text = trace.text?.map((of) => data.texts[of] ?? of);
    plot.textContent = "";
    if (figure.data.some((trace) => trace.customdata)) {
      for (const trace of figure.data) trace.unselected = {marker: {opacity: 0.1}};
      figure.data.push({x: [], y: [], mode: "markers", showlegend: false, hoverinfo: "skip",
                        marker: {symbol: "circle-open", size: 17, color: "#be185d", line: {width: 3}}});
      plots[name] = plot;
    }
    await Plotly.newPlot(plot, figure.data, figure.layout, config);
    plot.on("plotly_click", ({points: [point]}) => choose(point.customdata?.[0], point.customdata?.[1]));
    for (const [index, {label, args}] of (menu?.buttons ?? []).entries()) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = label;
      button.setAttribute("aria-pressed", index === 0);
      button.onclick = async () => {
        for (const other of button.parentElement.children) other.setAttribute("aria-pressed", other === button);
        await Plotly.update(plot, ...args, every);
        mark();
      };
      document.querySelector(`[data-for="${name}"]`).append(button);
    }
  }
}

if (data.parallel) {
  lines = parallelCoordinates(document.getElementById("parallel"), data.parallel, {onChoose: choose, onFilter: (names) => {
    passing = names;
    mark();
  }});
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

const drawn = draw();
