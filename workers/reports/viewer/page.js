"use strict";

// The case table: a click on a heading sorts by it, the field above it keeps the rows that hold its text.
(() => {
  const table = document.getElementById("cases-table");
  if (!table) return;
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    const number = cell.dataset.number;
    return number === undefined ? cell.textContent : number === "" ? "" : Number(number);
  };
  const compare = (a, b) => {
    // cells without a value come last either way
    if (a === "" || b === "") return (a === "") - (b === "");
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  };
  for (const heading of table.tHead.rows[0].cells) {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keyed = [...body.rows].map((row) => [key(row, heading.cellIndex), row]);
      keyed.sort(([a], [b]) => (down && a !== "" && b !== "" ? compare(b, a) : compare(a, b)));
      body.append(...keyed.map(([, row]) => row));
    });
  }
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => {
    const wanted = filter.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
})();

// The viewers: one canvas for the whole page, moved to the case that is looked at; browsers allow few of them.
(() => {
  const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  let library = null;
  let shown = null;

  const load = () => {
    library ??= (async () => {
      const packed = new Blob([bytesOf(document.getElementById("niivue").textContent.trim())]);
      const source = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
      const script = document.createElement("script");
      // the page's policy lets exactly this text run, by its SHA-256
      script.textContent = source;
      document.head.append(script);
      const { Niivue, NVImage, MULTIPLANAR_TYPE, SLICE_TYPE, SHOW_RENDER } = window.niivue;
      const canvas = document.createElement("canvas");
      const viewer = new Niivue({
        backColor: [0, 0, 0, 1],
        crosshairColor: [1, 1, 1, 0.5],
        crosshairWidth: 0.3,
        dragAndDropEnabled: false,
        isRadiologicalConvention: true,
        loadingText: "",
        logLevel: "error",
        multiplanarLayout: MULTIPLANAR_TYPE.GRID,
        multiplanarShowRender: SHOW_RENDER.ALWAYS,
        sagittalNoseLeft: true,
        show3Dcrosshair: false,
        isOrientCube: true,
      });
      return { canvas, viewer, NVImage, SLICE_TYPE, attached: false };
    })();
    return library;
  };

  const open = async (box) => {
    const said = box.querySelector(".said");
    said.textContent = "Loading …";
    try {
      const tools = await load();
      const { viewer, canvas, NVImage, SLICE_TYPE } = tools;
      const data = JSON.parse(document.getElementById(box.dataset.volumes).textContent);
      if (shown) close(shown);
      box.querySelector(".stage").hidden = false;
      box.querySelector(".stage").append(canvas);
      if (!tools.attached) {
        await viewer.attachToCanvas(canvas);
        tools.attached = true;
      }
      while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[0]);
      if (data.image) {
        const image = await NVImage.loadFromBase64({ base64: data.image, name: "image.nii.gz", colormap: "gray" });
        // the darkest greys are air and noise, which would lie before everything in 3-D
        [image.cal_min, image.cal_max] = [20, 255];
        viewer.addVolume(image);
      }
      const mask = await NVImage.loadFromBase64({ base64: data.mask, name: "mask.nii.gz", colormap: "gray" });
      const [first, ...rest] = [0, 1, 2].map((c) => [0, ...data.labels.map((label) => label.rgb[c])]);
      mask.setColormapLabel({
        R: first,
        G: rest[0],
        B: rest[1],
        A: [0, ...data.labels.map(() => 255)],
        I: [0, ...data.labels.map((label) => label.index)],
        labels: ["", ...data.labels.map((label) => label.name)],
      });
      viewer.addVolume(mask);
      const maskAt = viewer.volumes.length - 1;
      const pressed = (name) => {
        for (const button of box.querySelectorAll("button[data-view]")) {
          button.setAttribute("aria-pressed", String(button.dataset.view === name));
        }
      };
      const views = {
        planes: () => { viewer.setSliceType(SLICE_TYPE.MULTIPLANAR); if (maskAt) viewer.setOpacity(0, 1); },
        scan: () => { viewer.setSliceType(SLICE_TYPE.RENDER); if (maskAt) viewer.setOpacity(0, 1); },
        mask: () => { viewer.setSliceType(SLICE_TYPE.RENDER); if (maskAt) viewer.setOpacity(0, 0); },
      };
      for (const button of box.querySelectorAll("button[data-view]")) {
        button.onclick = () => { views[button.dataset.view](); pressed(button.dataset.view); };
      }
      const strength = box.querySelector("input[type=range]");
      strength.oninput = () => viewer.setOpacity(maskAt, Number(strength.value) / 100);
      viewer.setOpacity(maskAt, Number(strength.value) / 100);
      viewer.setRenderAzimuthElevation(115, 12);
      const centre = data.centre;
      if (centre) viewer.scene.crosshairPos = viewer.mm2frac(centre, 0, true);
      views.planes();
      pressed("planes");
      viewer.resizeListener();
      viewer.drawScene();
      box.querySelector(".tools").hidden = false;
      box.querySelector("button.open").hidden = true;
      said.textContent = "Drag in a plane to move the cross, in the 3-D picture to turn it. Made coarser for this page.";
      shown = box;
    } catch (error) {
      said.textContent = `The viewer cannot run in this browser (${error.message}); it needs WebGL 2. The picture above shows the same mask.`;
    }
  };

  const close = (box) => {
    box.querySelector(".stage").hidden = true;
    box.querySelector(".tools").hidden = true;
    box.querySelector("button.open").hidden = false;
    box.querySelector(".said").textContent = "";
  };

  for (const box of document.querySelectorAll(".viewer")) {
    box.querySelector("button.open").hidden = false;
    box.querySelector("button.open").addEventListener("click", () => open(box));
  }
})();
