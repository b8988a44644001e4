// Pictures in rows and columns for freqseg.faces.widgets.PictureGrid, as anywidget loads it: nothing is built or fetched.

const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const ABOUT = "Activation maps. Click a patch, or move over the patches with the arrow keys, to see what it is related to.";

// A notebook has commands on single keys, which keys typed in a control would trigger. Escape leads back to the cell.
function keepKeys(area) {
  if (!area || area.dataset.fsKeys) return;
  area.dataset.fsKeys = "1";
  area.addEventListener("keydown", event => {
    const runs = event.shiftKey && event.key === "Enter";
    if (event.key === "Escape" && !event.defaultPrevented) {
      const cell = area.closest(".jp-Cell");
      event.target.blur();
      if (cell) { cell.tabIndex = cell.tabIndex < 0 ? 0 : cell.tabIndex; cell.focus(); }
    } else if (!(event.ctrlKey || event.metaKey || event.altKey || runs)) event.stopPropagation();
  });
}

function node(name, content = "") {
  const made = document.createElement("div");
  made.className = name; made.textContent = content;
  return made;
}

function render({ model, el }) {
  const root = node("fs-grid");
  el.append(root);
  setTimeout(() => keepKeys(el.closest(".jp-OutputArea-output")), 0);
  let table, images = [], urls = [];

  // ---- the patch that is marked

  function choose(row, column) {
    const [h, w] = model.get("grid");
    model.set("patch", [Math.min(h - 1, Math.max(0, row)), Math.min(w - 1, Math.max(0, column))]);
    model.save_changes();
  }

  function clicked(event, image) {
    const area = image.getBoundingClientRect(), [h, w] = model.get("grid");
    choose(Math.floor(h * (event.clientY - area.top) / area.height), Math.floor(w * (event.clientX - area.left) / area.width));
    table.focus({ preventScroll: true });
  }

  function moved(event) {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault(); event.stopPropagation();
    const [h, w] = model.get("grid"), patch = model.get("patch");
    const from = patch.length === 2 ? patch : [Math.floor(h / 2), Math.floor(w / 2)];
    choose(from[0] + step[0], from[1] + step[1]);
  }

  function mark() {
    const [h, w] = model.get("grid"), patch = model.get("patch");
    root.querySelectorAll(".fs-mark").forEach(one => {
      one.hidden = patch.length !== 2;
      if (one.hidden) return;
      one.style.left = `${100 * patch[1] / w}%`; one.style.top = `${100 * patch[0] / h}%`;
      one.style.width = `${100 / w}%`; one.style.height = `${100 / h}%`;
    });
  }

  // ---- the table

  function frame(cell) {
    const box = node("fs-frame"), image = document.createElement("img");
    image.alt = cell.alt; image.draggable = false;
    box.append(image);
    images.push(image);
    if (model.get("clickable")) {
      const square = node("fs-mark");
      square.hidden = true;
      box.append(square);
      box.classList.add("fs-click");
      box.addEventListener("click", event => clicked(event, image));
    }
    return box;
  }

  function rowName(row) {
    const name = node("fs-name", row.length ? row[0].name : "");
    if (row.length && row[0].colour) {
      name.style.borderLeft = `5px solid ${row[0].colour}`; name.title = "this class's colour in the labels";
    }
    return name;
  }

  function fillTable(rows) {
    const columns = Math.max(1, ...rows.map(row => row.length)), named = rows.some(row => row.some(cell => cell.name));
    const widest = { 1: 190, 2: 150 }[model.get("clickable") ? rows.length : 2] || 120;
    table.style.gridTemplateColumns = `${named ? "auto " : ""}repeat(${columns}, minmax(60px, ${widest}px))`;
    rows.forEach((row, place) => {
      const above = rows[place - 1] || [], spare = columns - row.length;
      const heads = row.map((cell, i) => above[i] && above[i].title === cell.title ? "" : cell.title);
      if (heads.some(Boolean)) {
        if (named) table.append(node("fs-name"));
        for (const head of [...heads, ...Array(spare).fill("")]) table.append(node("fs-head", head));
      }
      if (named) table.append(rowName(row));
      row.forEach(cell => table.append(frame(cell)));
      for (let i = 0; i < spare; i++) table.append(node(""));
    });
  }

  function colourBar(colours) {
    const side = node("fs-bar"), strip = node("fs-strip");
    strip.style.background = `linear-gradient(to top, ${colours.join(", ")})`;
    side.append(node("", "1"), strip, node("", "0"), node("fs-unit", model.get("unit")));
    return side;
  }

  function build() {
    root.replaceChildren(); images = [];
    table = node("fs-table");
    fillTable(model.get("rows"));
    if (model.get("clickable")) {
      table.tabIndex = 0;
      table.setAttribute("role", "application"); table.setAttribute("aria-label", ABOUT);
      table.addEventListener("keydown", moved);
    }
    root.append(table);
    if (model.get("bar").length) root.append(colourBar(model.get("bar")));
    mark();
  }

  // ---- the pictures: a new one takes the old one's place when it is decoded, so nothing flickers

  function fill() {
    const old = urls;
    urls = model.get("pictures").map(bytes => URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" })));
    const ready = images.map((image, place) => {
      if (!urls[place]) return Promise.resolve();
      const next = new Image();
      next.src = urls[place];
      return next.decode().catch(() => {}).then(() => { image.src = urls[place]; });   // of the newest, should there be newer ones
    });
    Promise.all(ready).then(() => setTimeout(() => old.forEach(url => URL.revokeObjectURL(url)), 1000));
  }

  function busy() {
    root.classList.toggle("fs-busy", model.get("busy"));
    root.setAttribute("aria-busy", model.get("busy"));
  }

  // Several traits may change in one message: one redraw answers them all.
  let queued = false, stale = false;
  function refresh(structure) {
    return () => {
      stale ||= structure;
      if (queued) return;
      queued = true;
      queueMicrotask(() => {
        queued = false;
        if (stale) { stale = false; build(); }
        fill();
      });
    };
  }

  for (const trait of ["rows", "bar", "unit"]) model.on(`change:${trait}`, refresh(true));
  for (const trait of ["patch", "grid"]) model.on(`change:${trait}`, mark);
  model.on("change:pictures", refresh(false)); model.on("change:busy", busy);
  build(); fill(); busy();
  return () => urls.forEach(url => URL.revokeObjectURL(url));
}
export default { render };
